"""Pre-trains with an output folder of its own for each process, as on hosts that share no disk; run by torchrun.

Usage: agreement_worker.py FOLDER ARGUMENTS..., where `FOLDER/RANK` is the output folder of a process.
"""

import os
import sys

from mocov3_hf.pretraining.pretrain import main


if __name__ == "__main__":
    main([*sys.argv[2:], "--output_dir", os.path.join(sys.argv[1], os.environ["RANK"])])
