"""The stages of a run on a Ray cluster: the only place that imports Ray."""

import os

# Ray reads these when it is imported, so they are set before any stage imports it. Each can be set otherwise.
_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # Else an alarming line (ray issue 53727) about every actor pool; real failures come as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else a fast stage runs ahead until half the object store is full, whatever the number of images.
    "RAY_DATA_DOWNSTREAM_CAPACITY_OBJECT_STORE_BUDGET_UTIL_THRESHOLD": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # With the default of 2 s every back-to-back report waits that long.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
