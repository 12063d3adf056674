"""What ``promptmix new-plugin`` writes, one file for each kind of part: real modules, which only their names tell from plugins.

``MyPart`` becomes the class, ``promptmix_my_part`` the module, ``promptmix-my-part`` the package, ``my_part`` the entry point.
"""
