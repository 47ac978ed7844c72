"""The page in the browser that `cvt app` serves: pictures in, classes and heat maps out.

It needs gradio, which is imported on use: `import cvt.app` loads neither gradio nor torch.
"""
