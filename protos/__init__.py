"""The wire format: one folder per proto package; stubs are generated and committed."""
