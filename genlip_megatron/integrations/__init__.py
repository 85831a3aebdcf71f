"""GenLIP inside other projects: lmms-eval, ONNX and torch.export. LLaVA-NeXT needs no code: docs/plugging-in.md."""
