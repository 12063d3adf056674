"""Image features in place of pictures, for methods whose image tower is frozen."""
