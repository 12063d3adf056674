"""One training on several devices: a process for each, which share the work of the towers and all know the whole batch.

Towers are where the time goes, and what they do to a picture or a class depends on no other one. So each process encodes its part
of the pictures and its part of the classes, and the features are gathered (``group.shared``). Everything behind the towers
(router, head, losses, evaluation) runs in every process on the whole batch, so that a loss that couples pictures or classes is
the loss of one device, and no method has to know of devices. Gradients of what stands in front of the towers are partial sums
then: ``group.average`` makes them whole.
"""
