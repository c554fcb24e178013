"""The forms in which a whole model can be written, a file each; `table.FORMS` holds them all."""
