#!/bin/sh
# Start the Triton of an unpacked wheel of nvidia-pytriton, for this computer alone:
#     sh start.sh ENVIRONMENT TRITON [flag of tritonserver ...]
# ENVIRONMENT is a virtual environment with qsm-deploy, TRITON where the wheel was unpacked.
set -eu
[ $# -ge 2 ] || { echo "usage: sh start.sh ENVIRONMENT TRITON [flag ...]" >&2; exit 2; }
folder=$(cd "$(dirname "$0")" && pwd)
environment=$(cd "$1" && pwd)
wheel=$(cd "$2" && pwd)
shift 2
server=$wheel/pytriton/tritonserver
# The backend takes the first python3 on the PATH, and needs its library.
PATH=$environment/bin:$PATH
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
library=$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
# The stub for this Python must lie beside the backend, and the wheel holds no execute bits.
stub=triton_python_backend_stub
cmp -s "$server/python_backend_stubs/$version/$stub" "$server/backends/python/$stub" ||
    cp "$server/python_backend_stubs/$version/$stub" "$server/backends/python/$stub"
chmod +x "$server/bin/tritonserver" "$server/backends/python/$stub"
LD_LIBRARY_PATH=$wheel/nvidia_pytriton.libs:$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PATH LD_LIBRARY_PATH
exec "$server/bin/tritonserver" --model-repository="$folder/models" \
    --backend-directory="$server/backends" \
    --http-address=127.0.0.1 --grpc-address=127.0.0.1 --metrics-address=127.0.0.1 "$@"
