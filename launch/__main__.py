"""`python -m launch BACKEND ...` is the same as `t5like launch BACKEND ...`."""

import sys

from t5like.cli.main import main

sys.argv.insert(1, "launch")
sys.exit(main())
