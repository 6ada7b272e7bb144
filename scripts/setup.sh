#!/bin/sh
# Create or refresh a virtual environment of this repository: .venv, or .venv-NAME with constraints/NAME.txt on top.
set -eu
cd "$(dirname "$0")/.."
environment=$1
python=${PYTHON:-python3}

# Install a Debian package, or say what to do. $1: what is missing; the others: the packages that have it.
install() {
    missing=$1
    shift
    if ! command -v apt-get >/dev/null; then
        echo "$missing missing. Install $* with this system's package manager, and run this again." >&2
        return 1
    elif [ "$(id -u)" = 0 ]; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    elif sudo -n true 2>/dev/null; then
        sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    else
        echo "$missing missing. Type: sudo apt-get install $*" >&2
        return 1
    fi
}

# torchcodec, with which coqui-tts reads reference recordings, loads the shared libraries of ffmpeg.
PATH="$PATH:/usr/sbin:/sbin" ldconfig -p | grep -q libavcodec || install "ffmpeg's libraries are" ffmpeg
# webrtcvad, which the extra eval needs, has no wheels and is compiled.
command -v cc >/dev/null || install "A C compiler is" gcc libc6-dev
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || install "Python's headers are" python3-dev
# What neuron-xtts judge compares with. Only its tests need it.
command -v espeak-ng >/dev/null || install "espeak-ng is" espeak-ng || echo "Going on without espeak-ng." >&2

# In which the page is tried. Only its tests need it.
command -v chromium >/dev/null || command -v google-chrome >/dev/null || install "Chromium is" chromium ||
    echo "Going on without Chromium." >&2

[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
pip="$environment/bin/python -m pip install --quiet --disable-pip-version-check"
case $environment in
.venv)
    echo "Installing torch, coqui-tts and the rest into $environment (about three minutes and 9 GB)"
    $pip --constraint constraints/neuron.txt --editable ".[host,eval,test,docs]"
    ;;
.venv-*)
    versions=constraints/${environment#.venv-}.txt
    echo "Installing $versions into $environment, on top of .venv"
    # A site directory of another environment: what is not installed here comes from there.
    here=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    there=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$there')" >"$here/base.pth"
    $pip --requirement "$versions"
    ;;
esac
touch "$environment/ready"
