"""As much of a real Dassl as a program needs to build a trainer: written for the tests, with Dassl's interfaces."""
