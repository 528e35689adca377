"""HOW adapters of different rank are added into the next model, and what of it each client receives: one file per method.

Methods (FedIT, HLoRA, ProductDelta, ...) implement `core.policies.Aggregator`; wrappers (Momentum, Clip, CA2FL, ...) go around one.
What several of them need is in `shared/`. The room imports `core` only, and a method imports no other one: wrappers alone know the
method that they wrap by default, which import-linter checks.

To add a method, write one new file with one frozen dataclass. It needs no registration: the laws of `tests/laws` find it in the
folder and hold it to everything that it does not name in `exempt`. It is `fedloom.NAME` then, also in
`from fedloom import *`; a line in `fedloom/__init__.pyi` makes it known to type checkers and editors.
"""

from __future__ import annotations
