#!/bin/sh
# log_resources.sh COMMAND... -o OBJECT ...: run a compiler command and move what ptxas says of registers, memory and
# spills to OBJECT.ptxas: one log an object file, so that it is as current as the object. setup_tools/resources.py reads
# them. Everything else, errors and warnings among it, is printed.
object=
previous=
for word in "$@"; do
    if [ "$previous" = -o ]; then object=$word; fi
    previous=$word
done
messages=$("$@" 2>&1)
status=$?
case $object in
    *.o) printf '%s\n' "$messages" >"$object.ptxas" ;;
esac
printf '%s\n' "$messages" | grep -Ev '^ptxas info|^ +[0-9]+ bytes stack frame|^$' >&2
exit $status
