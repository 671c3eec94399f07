"""One of two ranks that tell each other things: what each has heard, to a file in the folder that is named.

python -m torch.distributed.run --nproc_per_node=2 world_rank.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from memplan.errors import MemplanError, UsageError
from memplan.world import least_share, odd_ranks, of_first, on_all


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def failing() -> int:
        if rank == 1:
            raise UsageError("the loader has no batch size")
        return 7

    try:
        failed = str(on_all(failing))
    except MemplanError as error:
        failed = f"{type(error).__name__}: {error}"
    heard = {
        "first": of_first(f"from {rank}"),
        "share": least_share(lambda: (100, 75)[rank]),
        "odd": odd_ranks(f"model {rank}"),
        "alike": odd_ranks("model"),
        "all": on_all(lambda: rank),
        "failed": failed,
    }
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(heard))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
