"What transformers runs for `custom_generate=FOLDER`: see the notebook 05_generate."
from bild_nb.generate import from_folder as generate
