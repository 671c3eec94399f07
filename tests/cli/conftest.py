import json
from pathlib import Path

import pytest
import tiny


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.LLAMA_CONFIG), encoding="utf-8")
    return path
