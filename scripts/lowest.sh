#!/usr/bin/env bash
# Runs the tests with the lowest release that pyproject.toml admits of every library it names.
# Arguments go to pytest. Needs the package index the first time.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly ENV=build/lowest-venv
mkdir -p build
# ">=1.2" becomes "==1.2"; linters are left at their newest, they are no part of what is shown here.
.venv/bin/python - > build/lowest.txt <<'PYTHON'
import re, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
for line in wanted:
    found = re.fullmatch(r"([\w.-]+)(\[\w+\])?>=([\w.]+).*", line)
    if found and found[1] not in {"mypy", "ruff", "import-linter"} and not found[1].startswith("types-"):
        print(f"{found[1]}=={found[3]}")
PYTHON
if ! cmp -s build/lowest.txt "$ENV/wanted.txt"; then
  .venv/bin/python -m venv --clear "$ENV"
  "$ENV/bin/python" -m pip install -q --disable-pip-version-check -c build/lowest.txt -e '.[dev]' || {
    echo "lowest: these releases cannot be installed together (or the package index is away)" >&2
    exit 1
  }
  cp build/lowest.txt "$ENV/wanted.txt"
fi
"$ENV/bin/python" -m pip list --disable-pip-version-check | grep -i -F -f <(cut -d= -f1 build/lowest.txt)
exec "$ENV/bin/python" -m pytest -n 3 --dist loadgroup "$@"
