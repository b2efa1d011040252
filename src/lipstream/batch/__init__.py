"""Many jobs, kill-safe: a manifest or folders in, finished files and one report line per item out.

`lipstream batch` and `lipstream prepare` stand on this. `manifest` reads what is wanted, `run` decides what is left to
do, a `Scheduler` (`processes` or `rays`) does it, `state` remembers it.
"""
