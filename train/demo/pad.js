/* A pad to draw a camera's path on. Its value: {points: [[x, y, seconds], …]}, x and y from 0 to 1, y down. */
const MOST = 2000;
let points = [], began = 0, pressed = false;
const canvas = () => element.querySelector("canvas");
const within = (value) => Math.max(0, Math.min(1, value));
const add = (event) => {
  const frame = canvas().getBoundingClientRect();
  const seconds = (event.timeStamp - began) / 1000;
  points.push([within((event.clientX - frame.left) / frame.width), within((event.clientY - frame.top) / frame.height), seconds]);
};
const paint = () => {
  const sheet = canvas(), pen = sheet.getContext("2d"), side = sheet.width;
  const ink = getComputedStyle(sheet);
  pen.clearRect(0, 0, side, side);
  pen.lineWidth = 1;
  pen.strokeStyle = ink.getPropertyValue("--pad-grid");
  for (let n = 1; n < 8; n++) {
    pen.beginPath();
    pen.moveTo(n * side / 8, 0); pen.lineTo(n * side / 8, side);
    pen.moveTo(0, n * side / 8); pen.lineTo(side, n * side / 8);
    pen.stroke();
  }
  const hint = element.querySelector(".hint");
  if (hint) hint.style.display = points.length ? "none" : "";
  if (points.length < 2) return;
  pen.lineWidth = 7;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = ink.getPropertyValue("--pad-line");
  pen.beginPath();
  points.forEach(([x, y], n) => n ? pen.lineTo(x * side, y * side) : pen.moveTo(x * side, y * side));
  pen.stroke();
  for (const [[x, y], name] of [[points[0], "--pad-start"], [points[points.length - 1], "--pad-end"]]) {
    pen.fillStyle = ink.getPropertyValue(name);
    pen.beginPath();
    pen.arc(x * side, y * side, 11, 0, 2 * Math.PI);
    pen.fill();
  }
};
element.addEventListener("pointerdown", (event) => {
  if (event.target !== canvas()) return;
  event.preventDefault();
  canvas().setPointerCapture(event.pointerId);
  points = []; began = event.timeStamp; pressed = true;
  add(event);
  paint();
});
element.addEventListener("pointermove", (event) => {
  if (!pressed || points.length >= MOST) return;
  const all = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  for (const each of all.length ? all : [event]) add(each);
  paint();
});
const lift = () => {
  if (!pressed) return;
  pressed = false;
  props.value = { points: points };
  requestAnimationFrame(paint);
  trigger("input");
};
element.addEventListener("pointerup", lift);
element.addEventListener("pointercancel", lift);
watch("value", () => {
  points = (props.value && props.value.points) || [];
  requestAnimationFrame(paint);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
points = (props.value && props.value.points) || [];
requestAnimationFrame(paint);
