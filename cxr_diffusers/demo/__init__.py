"""The web page, `cxr-diffusers demo`: drop a radiograph, see where it is abnormal.

`uploads` reads what is handed in, `answers` asks the model and draws, `page` puts it on a page, `serve` opens the port.
"""

import os

# Gradio reads it when it is imported, which is after this: nothing about anybody's use goes anywhere
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
