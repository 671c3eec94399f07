"""What every record that is written to a file or to stdout has in common."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen, and with no other fields than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
