"""The README and docs/, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *DOCS)}
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.S)]
COMMANDS = list(dict.fromkeys(line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()))
