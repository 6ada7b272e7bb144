#!/bin/sh
# Create or refresh a virtual environment of this repository: .venv, or .venv-NAME with constraints/NAME.txt on top.
set -eu
cd "$(dirname "$0")/.."
environment=$1
python=${PYTHON:-python3}

# torchcodec, with which coqui-tts reads reference recordings, loads the shared libraries of ffmpeg.
if ! PATH="$PATH:/usr/sbin:/sbin" ldconfig -p | grep -q libavcodec; then
    if ! command -v apt-get >/dev/null; then
        echo "ffmpeg's libraries are missing. Install ffmpeg with this system's package manager, and run this again." >&2
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ffmpeg
    elif sudo -n true 2>/dev/null; then
        sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ffmpeg
    else
        echo "ffmpeg's libraries are missing. Type: sudo apt-get install ffmpeg" >&2
        exit 1
    fi
fi

[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
pip="$environment/bin/python -m pip install --quiet --disable-pip-version-check"
case $environment in
.venv)
    echo "Installing torch, coqui-tts and the rest into $environment (about three minutes and 8 GB)"
    $pip --constraint constraints/neuron.txt --editable ".[host,test]"
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
