"""`vamo-ft` with signs of life every tenth of a second, of which ten may be missing, as a module for a process.

python -m tests.silent train FILE
"""

from datetime import timedelta

import pytest

from vamo_ft.cli import main
from vamo_ft.training import heartbeat

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat, "_BETWEEN", timedelta(seconds=0.1))
        patch.setattr(heartbeat, "_ROUNDS", 10)
        main()
