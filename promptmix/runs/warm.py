"""Imported by the process that a sweep's jobs are forked from: all that a job would import before it begins."""

from promptmix.plugin_manager import import_built_in

import_built_in()
