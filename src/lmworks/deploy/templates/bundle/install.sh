#!/bin/sh
# ./install.sh [FOLDER]: check every byte, then install $name into FOLDER (/opt/$name) from what lies here alone.
set -eu
umask 022  # the unit serves as a user of its own
target=$${1:-/opt/$name}
case $$target in /*) ;; *) target=$$PWD/$$target ;; esac
cd "$$(dirname "$$0")"
fail() {
  echo "install.sh: $$1" >&2
  exit 2
}
sha256sum --check --quiet --strict SHA256SUMS || fail "the bundle is damaged: copy it again"
listed=$$(cut -c 67- SHA256SUMS | LC_ALL=C sort)
held=$$(find . ! -type d ! -path ./SHA256SUMS ! -path ./lmworks.json | cut -c 3- | LC_ALL=C sort)
[ "$$listed" = "$$held" ] || fail "there are other files than SHA256SUMS lists: copy the bundle again"
[ "$$(uname -m)" = "$machine" ] || fail "this bundle is for $machine, this machine is $$(uname -m)"
command -v python$python > /dev/null || fail "python$python is missing (on Debian also python$python-venv)"
[ ! -e "$$target" ] || fail "$$target is there already: name another folder, or remove it"
staged=$$target.staged
rm -rf "$$staged"
trap 'rm -rf "$$staged"' EXIT
mkdir -p "$$staged/models"
cp -R model "$$staged/models/$name"
chmod -R u=rwX,go=rX "$$staged"
mv "$$staged" "$$target"
trap 'rm -rf "$$target"' EXIT
python$python -m venv "$$target/environment"
"$$target/environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps wheels/*.whl
trap - EXIT
echo "Serve it: $$target/environment/bin/lmworks serve $$target/models/$name --port $port"
