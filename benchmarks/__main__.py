"""`python -m benchmarks`: what can be measured on any machine."""

import sys

from benchmarks.build_engine import main

sys.exit(main())
