"""HLoRA's experiment on QQP with all-MiniLM-L6-v2: 18,797 pairs over 20 clients, scored on 1,500 of those split off.

python experiments/hlora_qqp.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...] [--device cuda]
"""

from __future__ import annotations

from grid import SHARED, main
from hlora import Study

from fedloom import Table

FILE = SHARED / "data" / "qqp" / "dev_part.tsv.gz"
STUDY = Study(
    "hlora_qqp",
    Table(FILE, text="question1", pair="question2", quoted=False),  # as measured
    target=0.70,  # fixed before the runs; the majority is 62.8 %
    client_size=500,
    test_limit=1500,
)
CELLS, GRID = STUDY.cells(), STUDY.grid()

if __name__ == "__main__":
    main(GRID)
