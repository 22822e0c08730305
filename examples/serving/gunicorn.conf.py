"""As many workers as processors, of one thread each (the Dockerfile says so), all forked from a process that is warm."""

import logging
import os

bind = "0.0.0.0:8000"
workers = int(os.environ.get("WORKERS", os.cpu_count() or 1))
preload_app = True
logging.basicConfig(level=logging.INFO)  # the logger "deformconv" then says what is compiled, and for how long
