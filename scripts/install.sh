#!/usr/bin/env bash
# scripts/install.sh VENV WHAT: `pip install --editable WHAT` into VENV. Says what it does and how far it is; of pip's
# own words only errors are shown.
set -euo pipefail
venv=$1 what=$2
size() { du -sm "$venv" 2>/dev/null | cut -f1 || true; }
mkdir -p "$venv/.tmp"
echo "Installing clipgraft $what into $venv ($("$venv/bin/python" --version))."
echo "PyTorch is most of it: up to 3 GB of downloads and 7 GB on disk on Linux (PyPI's build has CUDA), under 1 GB on"
echo "macOS; 1 to 10 minutes, by the network. Downloads are kept in the cache of pip."
# Downloads and unpacked files lie below the environment, so that its size tells how far pip is.
TMPDIR=$PWD/$venv/.tmp
[[ $venv = /* ]] && TMPDIR=$venv/.tmp
export TMPDIR
started=$SECONDS
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable "$what" &
pip=$!
trap 'kill $pip 2>/dev/null || true' INT TERM
every=5
[ -t 1 ] || every=30
while kill -0 $pip 2>/dev/null; do
    for _ in $(seq $((every * 5))); do
        kill -0 $pip 2>/dev/null || break
        sleep 0.2
    done
    kill -0 $pip 2>/dev/null || break
    line="  $((SECONDS - started)) s, $venv holds $(size) MB so far"
    if [ -t 1 ]; then printf '\r%s' "$line"; else echo "$line"; fi
done
[ -t 1 ] && printf '\n'
rc=0
wait $pip || rc=$?
rm -rf "$venv/.tmp"
if [ $rc != 0 ]; then
    echo "pip failed ($rc) after $((SECONDS - started)) s; what it said stands above, and running make again goes on" >&2
    exit $rc
fi
echo "Installed in $((SECONDS - started)) s: $(size) MB in $venv."
