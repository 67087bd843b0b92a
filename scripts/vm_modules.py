"""Copy kernel modules and what they depend on into a folder, with the order to load them in.

Usage: vm_modules.py KERNEL_ROOT FOLDER MODULE...
"""

import re
import shutil
import sys
from pathlib import Path


def main() -> None:
    """Copy, and write the file names to FOLDER/order."""
    root, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found = {path.stem.replace("-", "_"): path for path in root.rglob("*.ko")}
    order: list[Path] = []

    def need(name: str) -> None:
        path = found.get(name.replace("-", "_"))
        if path is None or path in order:  # built into the kernel, or there already
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in (depends[1].decode() if depends else "").split(","):
            need(other)
        order.append(path)

    for name in sys.argv[3:]:
        need(name)
    for path in order:
        shutil.copy(path, folder)
    (folder / "order").write_text("".join(f"{path.name}\n" for path in order))


main()
