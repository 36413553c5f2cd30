"""Loaded once by the process that tests fork from: everything a run needs, nothing started yet."""

import tests.e2e.workload
import tests.typechecker  # noqa: F401
import torch  # noqa: F401

import logitcache.server.labelling.precompute
import logitcache.storage.zarr_library  # noqa: F401
