#!/bin/sh
# ./install.sh [FOLDER]: check every byte, then install $name into FOLDER (/opt/$name) from what lies here alone.
set -eu
cd "$$(dirname "$$0")"
target=$${1:-/opt/$name}
fail() {
  echo "install.sh: $$1" >&2
  exit 2
}
sha256sum --check --quiet --strict SHA256SUMS || fail "the bundle is damaged: copy it again"
[ "$$(uname -m)" = "$machine" ] || fail "this bundle is for $machine, this machine is $$(uname -m)"
command -v python$python > /dev/null || fail "python$python is missing (on Debian also python$python-venv)"
[ ! -e "$$target" ] || fail "$$target is there already: name another folder, or remove it"
case $$target in /*) ;; *) target=$$PWD/$$target ;; esac
staged=$$target.staged
rm -rf "$$staged"
trap 'rm -rf "$$staged"' EXIT
mkdir -p "$$staged/models"
cp -R model "$$staged/models/$name"
mv "$$staged" "$$target"
trap 'rm -rf "$$target"' EXIT
python$python -m venv "$$target/environment"
"$$target/environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps wheels/*.whl
trap - EXIT
echo "Serve it: $$target/environment/bin/lmworks serve $$target/models/$name --port $port"
