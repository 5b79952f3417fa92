import sys

from bench.route.command import main

sys.exit(main())
