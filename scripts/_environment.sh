# Sourced by demo and test: makes the project's own virtual environment and installs kdctl into it, once.
# usage: prepare_environment [EXTRAS]      for example: prepare_environment '[dev]'

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"

prepare_environment() {
  local extras="${1:-}" base="" candidate stamp want
  if [ ! -x "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    if [ -z "$base" ]; then
      echo "kdctl needs Python 3.11 or newer on the PATH" >&2
      return 4
    fi
    "$base" -m venv "$root/.venv" || return 1
  fi
  # Installed again only when what is asked for has changed, so that a second run needs no network.
  stamp="$root/.venv/.kdctl-installed"
  want=$(cat "$root/pyproject.toml" "$root/constraints-cpu.txt" | cksum)
  if ! grep -qxF "$extras $want" "$stamp" 2>/dev/null; then
    echo "installing kdctl$extras into $root/.venv (about a minute) ..." >&2
    "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints-cpu.txt" -e "$root$extras" || return 1
    echo "$extras $want" >> "$stamp"
  fi
}
