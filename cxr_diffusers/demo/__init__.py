"""The web page, `cxr-diffusers demo`: drop a radiograph, see where it is abnormal.

`uploads` reads files, `analysis` runs the model, `rendering` draws its answer, `page` is the layout with its event
handlers, `serve` opens the port, `guard` refuses requests from other web sites.
"""

import os

# Gradio reads it on import, which happens after this: no usage statistics are sent
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
