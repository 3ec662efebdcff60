"""The terminal program of `edgemed chat`: Textual screens over the engine and the case store. Imports core, clinic and runtimes."""
