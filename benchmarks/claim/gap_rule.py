"""Stage 4 with fewer candidates: those more than a gap of nats below the most probable are never chosen.

Reads and writes what stage 4 does, in the working directory. Guides are asked about all candidates all the
same: what is measured is what the rule does to a text, not what it saves.

    PYTHONPATH=PARGS_decode python benchmarks/claim/gap_rule.py 3 --methods TOP-K BESTN ...
"""

import sys

import PARGS_baselines as decoding
import torch


def main() -> None:
    gap, own = float(sys.argv.pop(1)), decoding.top_candidates

    def near_candidates(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        candidates, log_probs = own(logits, k)
        return candidates, log_probs.masked_fill(log_probs < log_probs[:, :1] - gap, -torch.inf)

    decoding.top_candidates = near_candidates
    decoding.main()


if __name__ == "__main__":
    main()
