"""The run-time check of annotations in tests: beartype, with an int accepted for a float, as in Python itself."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
