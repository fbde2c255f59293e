"""The same for graphs of static shapes, which engines are built from: nothing sorts, no size depends on data."""
