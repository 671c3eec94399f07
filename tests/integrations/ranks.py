"""Run by two processes (`torch.distributed.run`): the training script under DistributedDataParallel, weights to a file.

python -m torch.distributed.run --nproc_per_node=2 ranks.py FOLDER PLAN|none ROWS
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integrations.scripts import train
from memplan.errors import MemplanError
from memplan.integrations.accelerate import attach


def main() -> None:
    folder, plan, rows, model = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    rank = int(os.environ["RANK"])
    line = None if plan == "none" else partial(attach, plan=plan)
    if plan.startswith("cpu"):
        line = partial(attach, gpu=plan, micro_batch=2, strategy="huggingface")
    try:
        ran = train(line, rows=rows, model=model if rank == 0 else sys.argv[5])
    except MemplanError as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        return
    accelerator = ran.accelerator
    seen = {
        "weights": [w.tolist() for w in ran.weights],
        "rates": ran.rates,
        "losses": ran.losses,
        "plan": accelerator.memplan.plan.model_dump_json() if line else None,
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
