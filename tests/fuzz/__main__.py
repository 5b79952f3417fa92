"""Run the fuzzer: ``python -m tests.fuzz``."""

import os
import sys

import torch

if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the import of triton; its interpreter is slow
    from tests.fuzz.running import main

    sys.exit(main())
