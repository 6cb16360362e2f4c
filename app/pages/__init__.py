"""The pages; each module's `build` makes its components and wires its events."""
