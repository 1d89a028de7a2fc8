// image-classification: choose, drop or paste a picture; its labels with bars.

const version = new URL(import.meta.url).search;
const { $, element } = await import(`./dom.js${version}`);
const { View } = await import(`./view.js${version}`);
const { showLabels } = await import(`./view-classify.js${version}`);

export class Picture extends View {
  verb = "Classify";
  fields = `<div id="drop" class="drop">
      <img id="preview" alt="The chosen picture" hidden>
      <label for="file"><b>Choose a picture</b><span>or drop one here, or paste it</span></label>
      <input id="file" type="file" accept="image/*">
    </div>`;
  image = null; // its data URL

  start(examples) {
    examples.forEach((example, i) => {
      const chip = element("button", "", { type: "button", class: "thumbnail" });
      chip.append(Object.assign(new Image(), { src: example.image, alt: `Example ${i + 1}` }));
      chip.onclick = () => {
        this.clear();
        this.fill(example);
      };
      $("examples").append(chip);
    });
    $("examples").hidden = examples.length === 0;
    if (examples.length) this.fill(examples[0]);
    $("file").onchange = () => this.open($("file").files[0]);
    const drop = $("drop");
    const over = (is) => (event) => {
      event.preventDefault();
      drop.classList.toggle("over", is);
    };
    drop.ondragover = over(true);
    drop.ondragleave = over(false);
    drop.ondrop = (event) => {
      over(false)(event);
      this.open(event.dataTransfer.files[0]);
    };
    addEventListener("paste", ({ clipboardData }) => this.open(clipboardData?.files[0]));
  }

  open(file) {
    if (!file) return;
    this.clear();
    $("problem").hidden = true;
    const reader = new FileReader();
    reader.onload = () => this.fill({ image: reader.result });
    reader.onerror = () => complain(`${file.name} could not be read.`);
    if (/^image\//.test(file.type)) reader.readAsDataURL(file);
    else complain(`${file.name} is not a picture.`);
  }

  fill({ image }) {
    this.image = image;
    const preview = $("preview");
    preview.onerror = () => {
      this.image = null;
      preview.hidden = true;
      complain("This browser cannot show that picture.");
    };
    preview.src = image;
    preview.hidden = false;
  }

  read() {
    if (this.image === null) {
      $("file").focus();
      throw new Error("Choose a picture first.");
    }
    return { image: this.image };
  }

  texts() {
    return [];
  }

  show(labels, _, { scores }) {
    showLabels(labels, scores);
  }
}

function complain(message) {
  $("problem").textContent = message;
  $("problem").hidden = false;
}
