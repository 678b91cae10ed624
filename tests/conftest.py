"""What holds for every test: few threads, no telemetry, private caches, and where real slides are."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# Before torch is imported anywhere: ranks of a test share the cores, and sums must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
# A DeepSpeed build that is killed by a test must not leave its lock where a user's next run waits for it.
os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="gigamil-extensions-")
atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)
# A shell starts what runs in its background with Ctrl-C ignored, and commands would inherit that from this process.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real slides; tests that use it carry the mark `real_data`."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("GIGAMIL_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"there are no real slides at '{folder}'; set GIGAMIL_TEST_DATA to the folder that holds wsi/")
    return folder
