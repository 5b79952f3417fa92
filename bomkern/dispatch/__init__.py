"""From a public call to the implementation that serves it: schemas, selection, routing, transforms, Triton."""
