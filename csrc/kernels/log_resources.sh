#!/bin/sh
# log_resources.sh LOG COMMAND...: run a compiler command and keep what ptxas says of registers and spills in LOG.
log=$1
shift
messages=$("$@" 2>&1)
status=$?
if [ -n "$messages" ]; then
    printf '%s\n' "$messages" | tee -a "$log" >&2
fi
exit $status
