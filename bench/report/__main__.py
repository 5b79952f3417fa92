import sys

from bench.report.write import main

sys.exit(main())
