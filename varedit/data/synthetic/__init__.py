"""The procedural world: endless edit pairs with known answers, deterministic from a seed."""

from varedit.data.synthetic.folder import to_record, write_world
from varedit.data.synthetic.world import Pair, World

__all__ = ["Pair", "World", "to_record", "write_world"]
