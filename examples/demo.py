"""Show in the browser what a run predicts after each of its tasks, and which prompts it selects: `pgp-hf demo`.

python examples/demo.py out/l2p_pgp
python examples/demo.py me/l2p-pgp-cifar100 --port 8000
"""

import sys

from pgp_hf.cli import console, demo

if __name__ == "__main__":
    sys.exit(console.run(demo.main))
