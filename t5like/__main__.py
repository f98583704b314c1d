"""`python -m t5like COMMAND`."""

import sys

from t5like.main import main

sys.exit(main())
