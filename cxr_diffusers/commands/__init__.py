"""The commands of the command line, one file each: `add(commands)` declares its options, `run(options)` runs it.

Imports of torch and diffusers take seconds, so each command imports its modules when it runs.
"""

from . import (
    calibrate,
    chexlocalize,
    convert,
    deblur,
    demo,
    detect,
    evaluate,
    export,
    prepare,
    publish,
    publish_data,
    train,
)

# in the order of `cxr-diffusers --help`
COMMANDS = (
    detect,
    demo,
    evaluate,
    chexlocalize,
    prepare,
    train,
    calibrate,
    deblur,
    publish,
    publish_data,
    convert,
    export,
)
