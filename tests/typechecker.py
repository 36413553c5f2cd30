"""The run-time check of annotations in tests: beartype, with an int accepted for a float, as in Python itself.

beartype looks at random items of containers. It draws them from a generator of its own here: drawn from Python's, in
whichever thread runs, they would change what augmentations and strategies draw.
"""

import random

import beartype._check.code.codemain as checks
from beartype import BeartypeConf, beartype

checks.getrandbits = random.Random(0).getrandbits  # type: ignore[attr-defined]

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
